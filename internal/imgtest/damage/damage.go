// Package damage makes damaged images: for each kind of damage a builder, what
// a check must find, what a repair must leave, and which guest ranges it may
// lose.
//
// Design note. A case is data, so that one test can run all of them through
// check, repair, undo and the oracles. The builder writes the image and, beside
// it, what the guest saw before the damage (Original). Codes are strings: the
// package knows nothing of the code under test.
package damage

import (
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/blockmap"
)

// State is what a check finds after a repair.
type State uint8

const (
	// Clean: nothing worse than a note.
	Clean State = iota
	// Leaks: leaks and nothing worse.
	Leaks
	// Damaged: damage is left that this repair does not touch.
	Damaged
	// Fatal: the image cannot be used; there is no repair in place.
	Fatal
)

func (s State) String() string {
	if int(s) < 4 {
		return [...]string{"clean", "leaks", "damaged", "fatal"}[s]
	}
	return "unknown"
}

// Damage is one kind of damage.
type Damage struct {
	Name   string
	Format string // of the image: qcow2, ploop, …
	// Build makes the damaged image in the empty directory dir and returns
	// its path, and writes Original(dir).
	Build func(t testing.TB, dir string) string
	// Codes are the names of findings that must all be there; others may be
	// there too.
	Codes []string
	// Data says that the damage is seen only when payload is decoded.
	Data bool
	// Preen and Full are the states after repairs with -p and -y.
	Preen, Full State
	// Lost are the guest ranges that a full repair may lose. Everything
	// outside reads as before the damage.
	Lost []blockmap.Range
	// Foreign is the exit status of the format's own checker (qemu-img check)
	// on the damaged image; -1 means that it does not matter. After a full
	// repair that ends Clean it must be 0.
	Foreign int
}

// Original is the raw file with what the guest saw before the damage.
func Original(dir string) string { return filepath.Join(dir, "original.raw") }
