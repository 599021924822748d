"""Responses of the student: who samples them, and who may stop one while it is written."""
