"""What commands print, as text: pure functions of a report, a plan or a receipt."""
