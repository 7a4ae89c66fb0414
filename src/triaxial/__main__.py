"""`python -m triaxial`: what torchrun starts."""

from triaxial.cli import main

if __name__ == "__main__":
    main()
