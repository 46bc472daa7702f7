"""The embedded default: images of products rendered by ourselves, with Chinese captions."""
