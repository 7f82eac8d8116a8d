"""Result cards: made, shown, compared."""
