"""What a person looks at: pictures, and one page from a run."""
