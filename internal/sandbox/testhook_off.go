//go:build !imagestack_testhook

package sandbox

// Attack does nothing. Built with the tag imagestack_testhook it acts as a
// parser that an image has taken over.
func Attack(string) {}
