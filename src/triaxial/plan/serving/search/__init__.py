"""The layouts that serve a demand: found, ranked, explained."""
