"""A generator as a static web page that runs in the visitor's browser."""
