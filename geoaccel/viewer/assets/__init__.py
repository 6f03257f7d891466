"""What the page is made of: its elements, style and scripts."""
