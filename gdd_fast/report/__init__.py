"""What a person looks at: the page of one or more runs, and what the layers of a network do.

Reads run folders and never imports training; training imports it, to write the page at every checkpoint.
"""
