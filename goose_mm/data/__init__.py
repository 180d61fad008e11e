"""What models learn from: books, labelled clips, sticker scenes with questions."""
