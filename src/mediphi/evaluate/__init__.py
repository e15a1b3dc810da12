"""Scoring: multiple choice by log-likelihood, texts against references, means with intervals."""
