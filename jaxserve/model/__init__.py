"""The models: what they are (config), how they compute (transformer), without pages, batches or files."""
