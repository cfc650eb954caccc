"""Published scores that rank keys, behind one interface (`Score`), and the rule of strategy `select`."""
