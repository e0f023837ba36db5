"""Does training a domain's expert path pay? Arms of equal budget, trained alike, compared on held-out documents."""
