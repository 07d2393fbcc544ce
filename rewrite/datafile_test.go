package rewrite_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/qcow2"
	"github.com/imagestack/imagestack/rewrite"
)

// TestDataFile: guest data in a file of its own is punched, the tables in the
// image move, and the second run finds nothing.
func TestDataFile(t *testing.T) {
	ctx := t.Context()
	for _, raw := range []bool{false, true} {
		o := qcow2.CreateOptions{Size: 8 << 20, ClusterSize: 4096, DataFile: "data", DataFileRaw: raw}
		image, data := backend.NewMem("image"), backend.NewMem("data")
		if raw {
			if err := data.Truncate(o.Size); err != nil {
				t.Fatal(err)
			}
		}
		if err := qcow2.Create(ctx, image, o); err != nil {
			t.Fatal(err)
		}
		open := func() *layers.Stack {
			t.Helper()
			img, err := qcow2.Open(ctx, kept{image}, layers.OpenOptions{Writable: true, OpenFile: func(string, bool) (backend.File, error) { return kept{data}, nil }})
			if err != nil {
				t.Fatal(err)
			}
			s, err := layers.NewStack([]layers.Layer{img}, layers.StackOptions{Writable: true})
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		s := open()
		rng := rand.New(rand.NewPCG(8, 8))
		err := scribble(ctx, s, rng, 200)
		for range 20 { // long runs of zeros
			if err == nil {
				off := rng.Int64N(o.Size>>18) << 18
				_, err = s.WriteAt(ctx, make([]byte, 256<<10), off)
			}
		}
		want := make([]byte, o.Size)
		if err == nil {
			_, err = s.ReadAt(ctx, want, 0)
		}
		if err = errors.Join(err, s.Close()); err != nil {
			t.Fatal(err)
		}
		before, _ := data.Allocated()
		run := func() *rewrite.Report {
			t.Helper()
			s := open()
			r, err := rewrite.CompactStack(context.Background(), s, rewrite.Options{})
			got := make([]byte, o.Size)
			_, rerr := s.ReadAt(ctx, got, 0)
			if err = errors.Join(err, rerr, s.Close()); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("raw %t: the content has changed", raw)
			}
			return r
		}
		r := run()
		after, _ := data.Allocated()
		if r.Steps[1].Bytes == 0 || after >= before {
			t.Errorf("raw %t: %d bytes of zeros, %d -> %d bytes of data", raw, r.Steps[1].Bytes, before, after)
		}
		if again := run(); again.Move != 0 || !raw && again.Steps[1].Bytes != 0 {
			t.Errorf("raw %t: again: %+v", raw, again.Steps)
		}
		if raw && !bytes.Equal(data.Bytes(), want) {
			t.Error("the data file is not the disk any more")
		}
	}
}

// TestDataFileEstimate: the length of a data file stays, and is not promised.
func TestDataFileEstimate(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	for _, raw := range []string{"on", "off"} {
		dir := t.TempDir()
		path := filepath.Join(dir, "image")
		imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", "data_file="+filepath.Join(dir, "data")+",data_file_raw="+raw, path, "8M")
		imgtest.QemuIO(t, "qcow2", path, "write -P 0 0 2M", "write -P 4 4M 1M")
		est := estimated(t, path)
		r := compacted(t, path)
		est2 := estimated(t, path)
		const tail = 4
		switch gone := r.Before.Apparent - r.After.Apparent; {
		case est.Steps[1].Bytes != 2<<20 || r.Steps[1] != est.Steps[1]:
			t.Errorf("raw %s: zeros: %+v, estimated %+v", raw, r.Steps[1], est.Steps[1])
		case est.Steps[tail].Bytes > 1<<20 || r.Steps[tail].Bytes != gone || est2.Steps[tail].Bytes != 0:
			t.Errorf("raw %s: the end: %+v of %d, estimated %+v, then %+v", raw, r.Steps[tail], gone, est.Steps[tail], est2.Steps[tail])
		case r.Ideal != est.Ideal || r.After.Apparent > r.Ideal:
			t.Errorf("raw %s: %+v, ideal %d, estimated %d", raw, r.After, r.Ideal, est.Ideal)
		case r.Before.Allocated-r.After.Allocated < 2<<20:
			t.Errorf("raw %s: %+v -> %+v", raw, r.Before, r.After)
		}
	}
}
