package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/imagestack/imagestack/layers"
)

// refcountOf reads the count of a cluster straight from the file, by the
// words of the specification.
func refcountOf(t testing.TB, img *Image, cluster int64) uint64 {
	t.Helper()
	width := int64(1) << img.hdr.RefcountOrder
	perBlock := img.clusterSize * 8 / width
	var w [8]byte
	at := int64(img.hdr.RefcountTableOffset) + cluster/perBlock*8
	if cluster/perBlock*8 >= int64(img.hdr.RefcountTableClusters)*img.clusterSize {
		return 0
	}
	if _, err := img.f.ReadAt(w[:], at); err != nil {
		t.Fatal(err)
	}
	block := int64(binary.BigEndian.Uint64(w[:]))
	if block == 0 {
		return 0
	}
	bit := cluster % perBlock * width
	if width < 8 {
		if _, err := img.f.ReadAt(w[:1], block+bit/8); err != nil {
			t.Fatal(err)
		}
		return uint64(w[0]) >> (bit % 8) & (1<<width - 1)
	}
	clear(w[:])
	if _, err := img.f.ReadAt(w[8-width/8:], block+bit/8); err != nil {
		t.Fatal(err)
	}
	return binary.BigEndian.Uint64(w[:])
}

// walkMatchesRefcounts compares the references that WalkHost finds with the
// counts in the image, which must have neither leaks nor damage.
func walkMatchesRefcounts(t testing.TB, img *Image) {
	t.Helper()
	found := map[int64]uint64{}
	err := img.WalkHost(context.Background(), func(r layers.HostRange) error {
		for off := r.Off; off < r.Off+r.Len; off += img.clusterSize {
			found[off>>img.clusterBits]++
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	size, err := img.f.Size()
	if err != nil {
		t.Fatal(err)
	}
	for c := int64(0); c<<img.clusterBits < size+8*img.clusterSize; c++ {
		if want := refcountOf(t, img, c); found[c] != want {
			t.Errorf("cluster %d: %d references found, refcount %d", c, found[c], want)
		}
	}
}

func wantImageError(t testing.TB, err, class error, field string) {
	t.Helper()
	var ie *layers.ImageError
	switch {
	case err == nil:
		t.Errorf("no error, want %s: %v", field, class)
	case !errors.Is(err, class):
		t.Errorf("error %v, want %v", err, class)
	case !errors.As(err, &ie):
		t.Errorf("error %v is no ImageError", err)
	case ie.Field != field:
		t.Errorf("error %v names field %q, want %q", err, ie.Field, field)
	case ie.Path == "":
		t.Errorf("error %v names no file", err)
	}
}
