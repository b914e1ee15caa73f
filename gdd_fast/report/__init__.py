"""What people look at: the page of one or more runs, and pictures of what a network's layers do.

Reads run folders and never imports training; training imports it, to write the page at every checkpoint.
"""
