package qcow2

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
)

// TestCreateCrash cuts the power at every moment of Create: the old image, no
// image or the whole new one is left, and each sync is needed for that.
func TestCreateCrash(t *testing.T) {
	o := CreateOptions{Size: 1 << 40, ClusterSize: 4 << 10, BackingFile: "the/base", BackingFormat: "raw"}
	old := golden(t, "v2.qcow2")
	for name, before := range map[string][]byte{"new file": nil, "over an image": old} {
		t.Run(name, func(t *testing.T) {
			r := backend.NewRecorder()
			f, err := r.Wrap(backend.NewMemBytes("image", before))
			if err != nil {
				t.Fatal(err)
			}
			if err := Create(context.Background(), f, o); err != nil {
				t.Fatal(err)
			}
			wrong := func(ignore int) error {
				for s := range r.States(backend.StateOptions{IgnoreSync: ignore}) {
					if err := createdOrNot(s.Files[0], o, old, s.Completed == r.Syncs()); err != nil {
						return fmt.Errorf("%v: %w", s, err)
					}
				}
				return nil
			}
			if err := wrong(0); err != nil {
				t.Error(err)
			}
			for n := 1; n <= r.SyncCalls(); n++ {
				if wrong(n) == nil {
					t.Errorf("nothing is wrong without sync %d", n)
				}
			}
		})
	}
}

// createdOrNot checks what a power cut left of Create.
func createdOrNot(f *backend.Mem, o CreateOptions, old []byte, must bool) error {
	img, err := Open(context.Background(), f, layers.OpenOptions{})
	if errors.Is(err, layers.ErrFormat) && !must {
		if head := f.Bytes(); len(head) >= 8 && Probe(head[:8]) {
			return fmt.Errorf("looks like an image: %w", err)
		}
		return nil
	}
	if err != nil {
		return err
	}
	if img.hdr.Version == 2 && !must {
		if string(f.Bytes()) != string(old) {
			return errors.New("the old image is damaged")
		}
		return nil
	}
	if img.Size() != o.Size || img.Parent() != (layers.Parent{Name: o.BackingFile, Format: o.BackingFormat}) {
		return fmt.Errorf("size %d, parent %+v", img.Size(), img.Parent())
	}
	end, _ := f.Size()
	want := map[int64]bool{}
	err = img.WalkHost(context.Background(), func(r layers.HostRange) error {
		for c := r.Off >> img.clusterBits; c < (r.Off+r.Len)>>img.clusterBits; c++ {
			want[c] = true
		}
		return nil
	})
	if err != nil {
		return err
	}
	var t quiet
	for c := int64(0); c<<img.clusterBits < end; c++ {
		if n := refcountOf(&t, img, c); (n == 1) != want[c] || t.failed {
			return fmt.Errorf("cluster %d: refcount %d, used %t", c, n, want[c])
		}
	}
	_, err = lookupAll(img)
	return err
}

// quiet notes a failure without ending a test.
type quiet struct {
	testing.TB
	failed bool
}

func (q *quiet) Helper()      {}
func (q *quiet) Fatal(...any) { q.failed = true }
