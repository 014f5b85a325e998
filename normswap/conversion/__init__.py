"""What a conversion replaces or inserts, how it is asked for, compared and summed up."""
