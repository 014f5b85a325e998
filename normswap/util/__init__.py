"""Small tools that several houses use."""
