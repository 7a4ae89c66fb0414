"""What a person looks at: tables, pictures and pages."""
