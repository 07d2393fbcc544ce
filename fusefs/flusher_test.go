package fusefs

import (
	"errors"
	"testing"
)

// A sync that covers every change that has ended is not made again; a change
// that ends while it runs, a failure, and the first one of all are.
func TestFlushOnce(t *testing.T) {
	var f flusher
	made := 0
	flush := func(during func(), result error) error {
		return f.flush(func() error {
			made++
			during()
			return result
		})
	}
	nothing := func() {}
	expect := func(what string, want int) {
		t.Helper()
		if made != want {
			t.Errorf("%s: %d syncs, want %d", what, made, want)
		}
		made = 0
	}
	_ = flush(nothing, nil)
	expect("the first", 1)
	_ = flush(nothing, nil)
	expect("without a change", 0)
	f.mark(1)
	_ = flush(func() { f.mark(2) }, nil)
	expect("after a change", 1)
	if f.since.Load() == 0 {
		t.Error("the change that ended meanwhile is forgotten")
	}
	_ = flush(nothing, nil)
	expect("after a change that ended meanwhile", 1)
	f.mark(3)
	broken := errors.New("broken")
	if err := flush(nothing, broken); err != broken || f.since.Load() == 0 {
		t.Errorf("a failed sync: %v", err)
	}
	expect("that fails", 1)
	_ = flush(nothing, nil)
	expect("after one that failed", 1)
	_ = flush(nothing, nil)
	expect("and then", 0)
	// One that began earlier and ends later covers less.
	f.mark(4)
	_ = flush(func() {
		f.mark(5)
		_ = flush(nothing, nil)
	}, nil)
	expect("two at once", 2)
	_ = flush(nothing, nil)
	expect("after two at once", 1)
}
