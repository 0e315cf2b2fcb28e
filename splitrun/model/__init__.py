"""What splitrun knows of Hugging Face models: structure, cuts, names on disk, weights."""
