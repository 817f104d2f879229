"""Where adapters come from: directories, the hub, object stores and web servers."""
