"""What a rule does, seen from outside: experiments, findings in words, pictures, and the table of all rules."""
