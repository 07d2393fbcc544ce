package scavenge_test

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/fsck/scavenge"
	"github.com/imagestack/imagestack/layers/ploop"
	"github.com/imagestack/imagestack/layers/qcow2"

	"github.com/imagestack/imagestack/backend"
)

// FuzzScavenge: whatever a file holds, the run ends, keeps the source as it
// is, and what it makes opens.
func FuzzScavenge(f *testing.F) {
	f.Add([]byte("WithouFreSpacExt"), uint8(1), false)
	q := make([]byte, 6<<9)
	be := binary.BigEndian
	be.PutUint32(q, qcow2.Magic)
	be.PutUint32(q[4:], 3)
	be.PutUint32(q[20:], 9)
	be.PutUint64(q[24:], 1<<20)
	be.PutUint32(q[36:], 32)
	be.PutUint64(q[40:], 3<<9)
	be.PutUint64(q[48:], 1<<9)
	be.PutUint32(q[56:], 1)
	be.PutUint32(q[100:], 104)
	be.PutUint64(q[1<<9:], 2<<9)
	for i := range 6 {
		be.PutUint16(q[2<<9+2*i:], 1)
	}
	be.PutUint64(q[3<<9:], 4<<9|1<<63) // L1
	be.PutUint64(q[4<<9:], 5<<9|1<<63) // L2
	copy(q[5<<9:], bytes.Repeat([]byte("x"), 512))
	f.Add(q, uint8(0), false)
	be.PutUint64(q[3<<9:], 0)
	f.Add(bytes.Clone(q), uint8(0), true)
	copy(q, make([]byte, 512))
	f.Add(q, uint8(2), true)
	f.Add(bytes.Repeat([]byte("\x00\x00EFI PARTXFSB\x53\xef"), 300), uint8(3), true)
	f.Fuzz(func(t *testing.T, b []byte, mode uint8, guess bool) {
		if len(b) > 1<<20 {
			return
		}
		dir := t.TempDir()
		path, name := filepath.Join(dir, "image"), filepath.Join(dir, "new")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		o := scavenge.Options{Guess: guess, Memory: 8 << 20}
		switch mode % 4 {
		case 1:
			o.Format, o.Size, o.ClusterSize = "ploop", 1<<20, 32<<10
		case 2:
			o.Format, o.Size = "qcow2", 1<<20
		case 3:
			o.Format, o.Size, o.ClusterSize = "qcow2", 1<<20, 512
		}
		r, err := scavenge.Run(t.Context(), path, name, o)
		if after, rerr := os.ReadFile(path); rerr != nil || !bytes.Equal(after, b) {
			t.Fatal("the source was changed")
		}
		if err != nil {
			gone(t, name)
			return
		}
		if (r.New != "") != (r.Exit&1 != 0) {
			t.Errorf("new %q, exit %d", r.New, r.Exit)
		}
		if r.New == "" {
			return
		}
		nf, err := backend.Open(name, backend.Options{})
		if err != nil {
			t.Fatal(err)
		}
		var opened interface{ Close() error }
		if r.To == "qcow2" {
			opened, err = qcow2.Open(t.Context(), nf, openOptions)
		} else {
			opened, err = ploop.Open(t.Context(), nf, openOptions)
		}
		if err != nil {
			nf.Close()
			t.Fatalf("the new image does not open: %v", err)
		}
		opened.Close()
	})
}
