"""The web page: conversations with a model in a browser, for many users at once (`mg-fast web`)."""
