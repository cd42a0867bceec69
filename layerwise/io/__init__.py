"""Opening and saving models: folders, GGUF files, demo models, and files that appear whole or not at all."""
