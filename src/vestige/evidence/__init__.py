"""Measuring what remains: tasks, probes, studies, references, claims, certificates, audits and reports."""
