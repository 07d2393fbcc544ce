package ploop

import (
	"bytes"
	"context"
	"crypto/md5"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/layertest"
	"github.com/imagestack/imagestack/layers"
)

// scattered is an image whose clusters, and those of its extension if it has
// one, lie at random, with free slots between them.
type scattered struct {
	bytes   []byte
	content []byte
	used    int64 // slots that are needed
}

// scatter makes an image of 32 KiB clusters with the given number of slots.
func scatter(seed uint64, version, slots, data, bitmaps int) scattered {
	const c = MinCluster
	rng := rand.New(rand.NewPCG(seed, 1))
	places := rng.Perm(slots)
	disk := data + 5
	s := scattered{content: make([]byte, disk*c), used: int64(data)}
	h := newHeader(version, c, int64(disk)*c)
	h.flags = 0
	first := int(h.firstData / c)
	s.bytes = make([]byte, (first+slots)*c)
	for k := first * c; k < len(s.bytes); k++ {
		s.bytes[k] = 0xee // what is not used holds something as well
	}
	le := binary.LittleEndian
	copy(s.bytes, h.raw[:])
	take := func() int {
		at := first + places[0]
		places = places[1:]
		return at
	}
	for n, idx := range rng.Perm(disk)[:data] {
		at := take()
		entry := uint32(at)
		if version == 1 {
			entry = uint32(at * c / sectorSize)
		}
		le.PutUint32(s.bytes[headerSize+4*idx:], entry)
		p := s.bytes[at*c : (at+1)*c]
		for k := range p {
			p[k] = byte(n+1) ^ byte(k>>8)
		}
		copy(s.content[idx*c:], p)
	}
	if bitmaps > 0 {
		s.extend(take, bitmaps, disk)
	}
	b := h.encode()
	copy(b[offExtension:], s.bytes[offExtension:offExtension+8])
	copy(b[offInUse:], s.bytes[offInUse:offInUse+4])
	copy(s.bytes, b[:])
	return s
}

// extend adds an extension with one bitmap of that many clusters of bits.
func (s *scattered) extend(take func() int, bitmaps, disk int) {
	const c = MinCluster
	le := binary.LittleEndian
	at := take()
	ext := s.bytes[at*c : (at+1)*c]
	clear(ext)
	le.PutUint64(ext, extMagic)
	p := ext[extHead:]
	le.PutUint64(p, bitmapMagic)
	le.PutUint32(p[16:], uint32(bitmapHead+8*bitmaps))
	p = p[featureHead:]
	le.PutUint64(p, uint64(disk*c/sectorSize))
	copy(p[8:24], "0123456789abcdef")
	le.PutUint32(p[24:], 1)
	le.PutUint32(p[28:], uint32(bitmaps))
	for k := range bitmaps {
		to := take()
		le.PutUint64(p[bitmapHead+8*k:], uint64(to*c/sectorSize))
		for j := range c {
			s.bytes[to*c+j] = bitsByte(k)
		}
	}
	sum := md5.Sum(ext[extHead:])
	copy(ext[8:], sum[:])
	le.PutUint64(s.bytes[offExtension:], uint64(at*c/sectorSize))
	le.PutUint32(s.bytes[offInUse:], inUseV21)
	s.used += int64(1 + bitmaps)
}

func bitsByte(k int) byte { return 0xa0 + byte(k) }

// sameBitmaps checks that the extension of a closed image is valid and that
// its bits are those that extend wrote.
func sameBitmaps(i *Image, want int) error {
	h := i.header()
	if h.extension == 0 || h.inUse != inUseV21 {
		return fmt.Errorf("extension at %#x, in use %#x", h.extension, h.inUse)
	}
	ext, err := i.readExtension(h.extension)
	if err != nil {
		return err
	}
	if len(ext.refs) != want {
		return fmt.Errorf("%d clusters of bits, want %d", len(ext.refs), want)
	}
	for k, r := range ext.refs {
		b := make([]byte, i.h.cluster)
		if _, err := i.f.ReadAt(b, r.host); err != nil {
			return err
		}
		if !bytes.Equal(b, bytes.Repeat([]byte{bitsByte(k)}, len(b))) {
			return fmt.Errorf("bits %d at %#x are others", k, r.host)
		}
	}
	return nil
}

// pack does what a compaction does with a layer.
func pack(ctx context.Context, i *Image, batch int64) error {
	if err := i.BeginRelocation(ctx, nil); err != nil {
		return err
	}
	var used int64
	if err := i.WalkHost(ctx, func(r layers.HostRange) error {
		if r.Role != layers.RoleHeader && r.Role != layers.RoleMap {
			used += r.Len
		}
		return nil
	}); err != nil {
		return err
	}
	if _, err := i.FreeLeaks(ctx); err != nil {
		return err
	}
	if _, err := i.Evacuate(ctx, i.h.firstData+used, layers.Relocation{Batch: batch}); err != nil {
		return err
	}
	return i.Shrink(ctx)
}

func TestPackScattered(t *testing.T) {
	ctx := context.Background()
	for seed := range uint64(60) {
		rng := rand.New(rand.NewPCG(seed, 2))
		slots, bitmaps := 3+rng.IntN(40), rng.IntN(4)
		data := rng.IntN(max(slots-bitmaps-1, 1))
		s := scatter(seed, 1+int(seed%2), slots, data, bitmaps)
		i, m, err := openBytes(s.bytes, true)
		if err != nil {
			t.Fatal(err)
		}
		if err := pack(ctx, i, int64(1+rng.IntN(4))*MinCluster); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		sameBytes(t, "before closing", stack{i}.content(t, nil), s.content)
		size, _ := i.f.Size()
		if want := i.h.firstData + s.used*MinCluster; size != want {
			t.Errorf("seed %d: %d bytes, want %d", seed, size, want)
		}
		b := slices.Clone(m.Bytes())
		closeImage(t, i)
		b2 := m.Bytes()
		if len(b2) != len(b) {
			t.Errorf("seed %d: closing changed the length", seed)
		}
		again, _, err := openBytes(b2, false)
		if err != nil {
			t.Fatal(err)
		}
		sameBytes(t, "after closing", stack{again}.content(t, nil), s.content)
		if bitmaps > 0 {
			if err := sameBitmaps(again, bitmaps); err != nil {
				t.Errorf("seed %d: %v", seed, err)
			}
		} else if h := again.header(); h.inUse != inUseClosed && h.inUse != s.inUse() {
			t.Errorf("seed %d: in use %#x", seed, h.inUse)
		}
	}
}

func (s scattered) inUse() uint32 { return binary.LittleEndian.Uint32(s.bytes[offInUse:]) }

// TestPackForOthers: what is left is an image for ploop and for QEMU.
func TestPackForOthers(t *testing.T) {
	imgtest.RequirePloop(t)
	imgtest.Require(t, "qemu-img")
	ctx := context.Background()
	for version := 1; version <= 2; version++ {
		for _, bitmaps := range []int{0, 1} {
			s := scatter(7, version, 30, 14, bitmaps)
			path := tempPath(t, "img.hds")
			if err := os.WriteFile(path, s.bytes, 0o600); err != nil {
				t.Fatal(err)
			}
			i := openFile(t, path, true)
			if err := pack(ctx, i, 2*MinCluster); err != nil {
				t.Fatal(err)
			}
			closeImage(t, i)
			if bitmaps == 0 { // ploop's check takes a valid extension for a leak and cuts it off
				if exit, out := imgtest.PloopCheck(t, path); exit != 0 || strings.Contains(out, "Hole") || strings.Contains(out, "trim") {
					t.Errorf("version %d: ploop check: %d\n%s", version, exit, out)
				}
			}
			if exit, out := imgtest.QemuCheck(t, path, "parallels"); exit != 0 && bitmaps == 0 {
				t.Errorf("version %d: qemu-img check: %d\n%s", version, exit, out)
			}
			raw := tempPath(t, "raw")
			imgtest.QemuRaw(t, "parallels", path, raw)
			got, err := os.ReadFile(raw)
			if err != nil {
				t.Fatal(err)
			}
			sameBytes(t, "for QEMU", got, s.content)
		}
	}
}

// siteFile notes who syncs.
type siteFile struct {
	backend.File
	sites *[]string
}

func (f siteFile) Sync() error {
	*f.sites = append(*f.sites, layertest.SyncSite())
	return f.File.Sync()
}

// harmlessSyncs are those on which the content does not depend.
var harmlessSyncs = map[string]string{
	"ploop.(*Image).finish": "it orders the length before the mark: TestCloseIsOrdered",
}

// TestPackPowerCut: whatever a power cut leaves shows the same content, with
// an extension that is valid or marked as not; and no sync can be left out.
func TestPackPowerCut(t *testing.T) {
	ctx := context.Background()
	const bitmaps = 2
	noticed := map[string]bool{}
	for seed := range uint64(3) {
		s := scatter(seed, 2, 12, 5, bitmaps)
		rec := backend.NewRecorder()
		f, err := rec.Wrap(backend.NewMemBytes("img.hds", s.bytes))
		if err != nil {
			t.Fatal(err)
		}
		var sites []string
		i, err := Open(ctx, siteFile{f, &sites}, layers.OpenOptions{Writable: true})
		if err != nil {
			t.Fatal(err)
		}
		if err := pack(ctx, i, 2*MinCluster); err != nil {
			t.Fatal(err)
		}
		closeImage(t, i)
		examine := func(ignore int) error {
			for st := range rec.States(backend.StateOptions{IgnoreSync: ignore, Random: 20, MaxPerEpoch: 30}) {
				if err := packedState(st, s, bitmaps, st.Completed == len(sites)); err != nil {
					return fmt.Errorf("%s: %w", st, err)
				}
			}
			return nil
		}
		if err := examine(0); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		for n, site := range sites {
			noticed[site] = noticed[site] || examine(n+1) != nil
		}
	}
	for site, ok := range noticed {
		t.Logf("%s: %v", site, ok)
		harmless := false
		for part := range harmlessSyncs {
			harmless = harmless || strings.Contains(site, part)
		}
		if ok == harmless {
			t.Errorf("%s: left out, noticed %v", site, ok)
		}
	}
}

func packedState(st *backend.State, s scattered, bitmaps int, closed bool) (err error) {
	i, _, err := openBytes(st.Files[0].Bytes(), false)
	if err != nil {
		return err
	}
	ctx := context.Background()
	got := make([]byte, len(s.content))
	for off := int64(0); off < i.Size(); {
		ext, err := i.Lookup(ctx, off, i.Size()-off, make([]blockmap.Extent, 0, 16))
		if err != nil {
			return err
		}
		for _, e := range ext {
			if e.Stored() {
				if _, err := i.f.ReadAt(got[e.Guest:e.End()], e.Host); err != nil {
					return err
				}
			}
			off = e.End()
		}
	}
	if !bytes.Equal(got, s.content) {
		return errors.New("the content is another")
	}
	if closed && i.header().inUse == inUseOpen {
		return errors.New("closed, but marked as in use")
	}
	if i.header().inUse == inUseOpen {
		// Going on must work with the extension as it is.
		return goesOn(st.Files[0].Bytes(), s, bitmaps)
	}
	return sameBitmaps(i, bitmaps)
}

// goesOn continues an interrupted relocation.
func goesOn(b []byte, s scattered, bitmaps int) error {
	ctx := context.Background()
	i, m, err := openBytes(b, true)
	if err != nil {
		return err
	}
	i.ResumeRelocation()
	if err := errors.Join(pack(ctx, i, 8*MinCluster), i.Close()); err != nil {
		return err
	}
	if want := i.h.firstData + s.used*MinCluster; int64(len(m.Bytes())) != want {
		return fmt.Errorf("%d bytes after going on, want %d", len(m.Bytes()), want)
	}
	again, _, err := openBytes(m.Bytes(), false)
	if err != nil {
		return err
	}
	return sameBitmaps(again, bitmaps)
}

// TestUnmapThenPack: dropped clusters are room for what moves, in the same run.
func TestUnmapThenPack(t *testing.T) {
	ctx := context.Background()
	s := scatter(3, 2, 20, 12, 1)
	i, m, err := openBytes(s.bytes, true)
	if err != nil {
		t.Fatal(err)
	}
	if err := i.BeginRelocation(ctx, nil); err != nil {
		t.Fatal(err)
	}
	var dropped int64
	if err := i.Own(ctx, 0, 9*MinCluster, func(e blockmap.Extent) error {
		dropped += e.Len
		clear(s.content[e.Guest:e.End()])
		return i.Unmap(ctx, e.Guest, e.Len)
	}); err != nil || dropped == 0 {
		t.Fatal(dropped, err)
	}
	s.used -= dropped / MinCluster
	if err := pack(ctx, i, 4*MinCluster); err != nil {
		t.Fatal(err)
	}
	closeImage(t, i)
	if want := i.h.firstData + s.used*MinCluster; int64(len(m.Bytes())) != want {
		t.Errorf("%d bytes, want %d", len(m.Bytes()), want)
	}
	again, _, err := openBytes(m.Bytes(), false)
	if err != nil {
		t.Fatal(err)
	}
	sameBytes(t, "content", stack{again}.content(t, nil), s.content)
	if err := sameBitmaps(again, 1); err != nil {
		t.Error(err)
	}
}

// TestBeginRelocationRefuses: what must not be relocated is refused, and the
// file stays as it was.
func TestBeginRelocationRefuses(t *testing.T) {
	le := binary.LittleEndian
	resum := func(b []byte) {
		at := int64(le.Uint64(b[offExtension:])) * sectorSize
		sum := md5.Sum(b[at+extHead : at+MinCluster])
		copy(b[at+8:], sum[:])
	}
	for _, c := range []struct {
		name   string
		change func(b []byte)
		want   error
	}{
		{"in use", func(b []byte) { le.PutUint32(b[offInUse:], inUseOpen) }, layers.ErrCorrupt},
		{"in use, without an extension", func(b []byte) {
			le.PutUint32(b[offInUse:], inUseOpen)
			le.PutUint64(b[offExtension:], 0)
		}, layers.ErrCorrupt},
		{"an unknown feature", func(b []byte) {
			at := int64(le.Uint64(b[offExtension:])) * sectorSize
			le.PutUint64(b[at+extHead:], 0x1234)
			resum(b)
		}, layers.ErrUnsupported},
		{"a wrong sum", func(b []byte) { b[int64(le.Uint64(b[offExtension:]))*sectorSize+100]++ }, layers.ErrCorrupt},
		{"a cluster of the extension is mapped", func(b []byte) {
			idx := 0
			for le.Uint32(b[headerSize+4*idx:]) == 0 {
				idx++
			}
			le.PutUint32(b[headerSize+4*idx:], uint32(le.Uint64(b[offExtension:])*sectorSize/MinCluster))
		}, layers.ErrCorrupt},
		{"two entries for one cluster", func(b []byte) {
			used, free := 0, 0
			for le.Uint32(b[headerSize+4*used:]) == 0 {
				used++
			}
			for le.Uint32(b[headerSize+4*free:]) != 0 {
				free++
			}
			le.PutUint32(b[headerSize+4*free:], le.Uint32(b[headerSize+4*used:]))
		}, layers.ErrCorrupt},
	} {
		s := scatter(5, 2, 12, 6, 1)
		c.change(s.bytes)
		i, m, err := openBytes(slices.Clone(s.bytes), true)
		if err != nil {
			t.Errorf("%s: open: %v", c.name, err)
			continue
		}
		if err := i.BeginRelocation(context.Background(), nil); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
		closeImage(t, i)
		if !bytes.Equal(m.Bytes(), s.bytes) {
			t.Errorf("%s: the file was changed", c.name)
		}
	}
}
