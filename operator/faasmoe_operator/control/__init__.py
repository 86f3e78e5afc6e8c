"""The control core's mechanism: talking to sandboxes, making functions resident."""
