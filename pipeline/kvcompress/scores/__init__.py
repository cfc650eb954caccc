"""Published scores that rank keys without seeing the question, behind one interface (`Score`)."""
