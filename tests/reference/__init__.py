"""The slow implementation, written from the definitions in DESIGN.md. The library never imports it, nor it the library."""
