"""What a sweep's result lines say: tests over a family fixed beforehand, tables, pictures, and one page that shows them."""
