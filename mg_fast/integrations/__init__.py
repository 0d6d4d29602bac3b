"""What ties mg_fast to other libraries. It imports nothing: `import mg_fast` itself goes through here."""
