package qcow2

import (
	"bytes"
	"context"
	"encoding/json"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/layers"
)

// Clusters are counted as far as that was paid for, and what was not counted
// is not called 0.
func TestDescribeWithin(t *testing.T) {
	ctx := context.Background()
	b := golden(t, goldenImages[0]+".qcow2")
	for _, most := range []int64{0, 1, 1 << 30} {
		img, err := Open(ctx, backend.NewMemBytes("image", b), layers.OpenOptions{MaxTables: most})
		if err != nil {
			t.Fatal(err)
		}
		info, err := img.Describe(ctx)
		if err != nil || info.Uncounted != (most == 1) || (info.UsedClusters == 0) != (most == 1) {
			t.Errorf("at most %d: %+v, %v", most, info, err)
		}
		text, err := json.Marshal(info)
		if err != nil || bytes.Contains(text, []byte(`"used-clusters":null`)) != (most == 1) || !bytes.Contains(text, []byte(`"format":"qcow2"`)) {
			t.Errorf("at most %d: %s, %v", most, text, err)
		}
		if err := img.Close(); err != nil {
			t.Error(err)
		}
	}
}

// L2 tables in a hole of the file are passed over; one of them that is none
// shows what it has, and for writing all are read.
func TestTablesInHole(t *testing.T) {
	ctx := context.Background()
	const cluster, tables = 64 << 10, 64
	const span = cluster / 8 * cluster
	f := backend.NewMem("image")
	if err := Create(ctx, f, CreateOptions{Size: tables * span, ClusterSize: cluster}); err != nil {
		t.Fatal(err)
	}
	size, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	h, err := readHeader(f)
	if err != nil {
		t.Fatal(err)
	}
	first := (size + cluster - 1) / cluster * cluster
	put := func(off int64, v uint64) {
		t.Helper()
		b := make([]byte, 8)
		for i := range b {
			b[i] = byte(v >> (56 - 8*i))
		}
		if _, err := f.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
	}
	for i := range int64(tables) {
		put(int64(h.L1Offset)+8*i, entryCopied|uint64(first+i*cluster))
	}
	data := first + tables*cluster
	if err := f.Truncate(data + cluster); err != nil {
		t.Fatal(err)
	}
	put(first+40*cluster+8*100, entryCopied|uint64(data)) // cluster 100 of table 40
	img, err := Open(ctx, f, layers.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	want := []blockmap.Extent{
		{Len: 40*span + 100*cluster},
		{Guest: 40*span + 100*cluster, Len: cluster, Host: data, Kind: blockmap.Data},
		{Guest: 40*span + 101*cluster, Len: 23*span + span - 101*cluster},
	}
	for range 2 { // the second time with what was learned
		var got []blockmap.Extent
		for e, err := range blockmap.All(ctx, img, 0, img.Size()) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, e)
		}
		if len(got) != 3 || got[0] != want[0] || got[1] != want[1] || got[2] != want[2] {
			t.Errorf("%+v, want %+v", got, want)
		}
	}
	if img.hole.Load() == nil {
		t.Error("no hole was noticed")
	}
	if info, err := img.Describe(ctx); err != nil || info.UsedClusters != 1 {
		t.Errorf("%+v, %v", info, err)
	}
}
