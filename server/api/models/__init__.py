"""The models of the server: as the API shows them, and how they are loaded and unloaded."""
