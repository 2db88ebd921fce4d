"""Protocols of public challenges: conversion, scoring by name, submission, and the paper's tables."""
