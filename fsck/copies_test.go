package fsck_test

import (
	"errors"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
)

// sized is a file that takes a number of bytes, or does not know.
type sized struct {
	backend.File
	used int64
	err  error
}

func (s sized) Allocated() (int64, error) { return s.used, s.err }

func TestCopyBudget(t *testing.T) {
	for _, c := range []struct {
		f    sized
		most int64
	}{
		{sized{used: 5 << 20}, fsck.FreeCopies},
		{sized{used: 3 << 30}, 3 << 30},
		{sized{used: 3 << 30, err: errors.New("not known")}, fsck.FreeCopies},
	} {
		var b fsck.CopyBudget
		if !b.Allows(c.f, c.most) || b.Allows(c.f, c.most+1) {
			t.Errorf("%v: at first not just %d bytes are allowed", c.f, c.most)
		}
		b.Spend(c.most - 10)
		if !b.Allows(c.f, 10) || b.Allows(c.f, 11) {
			t.Errorf("%v: with %d bytes spent, not just 10 more are allowed", c.f, c.most-10)
		}
	}
}
