"""Routers fitted in closed form to a pretrained model and a little text."""
