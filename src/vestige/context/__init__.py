"""What generation keeps of its context: entries dropped, thinned, selected or planned per head."""
