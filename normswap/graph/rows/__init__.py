"""Which sample each row of a norm's input comes from, measured."""
