"""Chinese text: the BERT tower and its tokens, the words of pages in two languages."""
