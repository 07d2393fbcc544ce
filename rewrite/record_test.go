package rewrite

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// fullDisk is a place for a record in which the first tries find no room.
type fullDisk struct {
	noRecord
	full  int
	calls []string
}

func (f *fullDisk) save(record) error {
	if f.full--; f.full >= 0 {
		f.calls = append(f.calls, "full")
		return unix.ENOSPC
	}
	f.calls = append(f.calls, "save")
	return nil
}

func (f *fullDisk) remove() error {
	f.calls = append(f.calls, "remove")
	return nil
}

// TestNoRoomForRecord: on a full disk the record is left when something was
// given back, and before that nothing is said to be resumed. A run that is
// resumed has one, whether there is room or not.
func TestNoRoomForRecord(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	for _, c := range []struct {
		full    int
		resume  bool
		stop    Phase
		want    []string
		pending bool
	}{
		{0, false, "", []string{"save", "remove"}, false},
		{1, false, "", []string{"full", "save", "remove"}, false},
		{2, false, "", []string{"full", "full", "remove"}, false},
		{0, false, PhaseZeros, []string{"save"}, true},
		{1, false, PhaseZeros, []string{"full"}, false},
		{1, false, PhaseLeaks, []string{"full", "save"}, true},
		{2, false, PhaseLeaks, []string{"full", "full"}, false},
		{2, true, "", []string{"remove"}, false},
		{2, true, PhaseZeros, nil, true},
		{2, true, PhaseLeaks, nil, true},
	} {
		path := filepath.Join(t.TempDir(), "a")
		imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", path, "1M")
		imgtest.QemuIO(t, "qcow2", path, "write -P 0 0 64k", "write -P 5 128k 64k")
		ctx, stop := context.WithCancel(t.Context())
		o := Options{Progress: func(p Progress) {
			if p.Phase == c.stop {
				stop()
			}
		}}
		target, err := openTarget(ctx, path, &o, compacting)
		if err != nil {
			t.Fatal(err)
		}
		record := &fullDisk{full: c.full}
		target.record = record
		j, err := newJob(ctx, target, o)
		if err != nil {
			t.Fatal(err)
		}
		err = j.compact(c.resume)
		if (err != nil) != (c.stop != "") || err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("%+v: %v", c, err)
		}
		if !slices.Equal(record.calls, c.want) || j.r.Pending != c.pending {
			t.Errorf("%+v: %q, pending %v", c, record.calls, j.r.Pending)
		}
		imgtest.QemuIO(t, "qcow2", path, "read -P 0 0 64k", "read -P 5 128k 64k")
		stop()
	}
}
