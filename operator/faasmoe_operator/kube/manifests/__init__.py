"""The objects of a MoEModel: values in, plain dictionaries out. Pure."""
