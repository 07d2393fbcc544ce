package lvm

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/guestfs/freespace"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/guesttest"
)

const mib = 1 << 20

func read(b []byte) (*Group, error) {
	v, err := Open(context.Background(), bytes.NewReader(b), blockmap.Range{Len: int64(len(b))})
	if err != nil {
		return nil, err
	}
	return Decode(context.Background(), bytes.NewReader(b), []*Volume{v})
}

// compare compares with what pvs says of each segment of the physical volume.
func compare(t testing.TB, vg *guesttest.VG, path, when string) {
	t.Helper()
	pv, err := read(guesttest.Bytes(t, path))
	if err != nil {
		t.Fatalf("%s: %v", when, err)
	}
	want, got := map[string]int64{}, map[string]int64{}
	for _, f := range pv.Free {
		for at := f.Off; at < f.End(); at += pv.ExtentSize {
			got[strconv.FormatInt(at/mib-1, 10)] = -1
		}
	}
	for _, l := range pv.LVs {
		for _, p := range l.Pieces {
			for n := int64(0); n < p.Len; n += pv.ExtentSize {
				got[strconv.FormatInt((p.At+n)/mib-1, 10)] = (p.Off + n) / mib
			}
		}
	}
	out := vg.Run("pvs", "--noheadings", "--segments", "--separator", "|", "-o", "pvseg_start,pvseg_size,lv_name,seg_start_pe")
	for line := range strings.Lines(out) {
		f := strings.Split(strings.TrimSpace(line), "|")
		if len(f) != 4 {
			continue
		}
		start, err := strconv.ParseInt(f[0], 10, 64)
		n, err2 := strconv.ParseInt(f[1], 10, 64)
		if err != nil || err2 != nil {
			continue // a warning
		}
		lv, _ := strconv.ParseInt(f[3], 10, 64)
		for i := range n {
			want[strconv.FormatInt(start+i, 10)] = lv + i
			if f[2] == "" {
				want[strconv.FormatInt(start+i, 10)] = -1
			}
		}
	}
	if len(want) != 60 {
		t.Fatalf("pvs lists %d extents:\n%s", len(want), out)
	}
	for at, lv := range want {
		if g, ok := got[at]; !ok || g != lv {
			t.Errorf("%s: extent %s: %d, pvs says %d", when, at, g, lv)
		}
	}
}

// Logical volumes created, extended, reduced and removed at random: the same
// extents are free, and hold the same, as for pvs. The ring of metadata goes
// around many times.
func TestAgainstPvs(t *testing.T) {
	path := guesttest.Image(t, 61*mib)
	vg := guesttest.NewVG(t, path)
	compare(t, vg, path, "new")
	rng := rand.New(rand.NewPCG(1, 6))
	var names []string
	for i := range 25 {
		switch k := rng.IntN(6); {
		case k < 3 && len(names) < 8:
			name := "lv" + strconv.Itoa(i)
			vg.Create(name, "-l", strconv.Itoa(1+rng.IntN(4)))
			names = append(names, name)
		case k < 5 && len(names) > 0:
			vg.Run("lvextend", "-q", "-l", "+"+strconv.Itoa(1+rng.IntN(2)), "vg/"+names[rng.IntN(len(names))])
		case len(names) > 0:
			n := rng.IntN(len(names))
			vg.Run("lvremove", "-q", "-f", "vg/"+names[n])
			names = slices.Delete(names, n, n+1)
		}
		compare(t, vg, path, "step "+strconv.Itoa(i))
	}
}

// textOf is a volume group of two linear volumes, into which a test writes
// what else it wants.
const textOf = `vg {
id = "LHiZFE-eKjX-353Y-nz01-zhdG-eRCu-VdPu9V" seqno = 8 format = "lvm2" STATUS
flags = [] extent_size = 2048 max_lv = 0 max_pv = 0 metadata_copies = 0 GROUP
physical_volumes { PVS pv0 { id = "gWR397-PYo0-TKKZ-PutE-IGM3-8CZF-gzNhRs" device = "/dev/sda"
status = ["ALLOCATABLE"] flags = [PVFLAGS] dev_size = 131072 pe_start = 2048 pe_count = 60 } }
logical_volumes {
root { id = "a" status = ["READ", "WRITE", "VISIBLE"] flags = [] segment_count = 1 # a comment }
segment1 { start_extent = 0 extent_count = 10 type = "striped" stripe_count = 1 stripes = [ "pv0", 3 ] } }
LVS } }
contents = "Text Format Volume Group"
version = 1
`

// image makes a physical volume of 64 MiB with a text. Its own checksums are
// right.
func image(text string) []byte {
	b := make([]byte, 64*mib)
	le := binary.LittleEndian
	l := b[sector:]
	copy(l, labelMagic)
	le.PutUint64(l[8:], 1)
	le.PutUint32(l[20:], 32)
	copy(l[24:], labelType)
	copy(l[32:], "gWR397PYo0TKKZPutEIGM38CZFgzNhRs")
	le.PutUint64(l[64:], 64*mib)
	le.PutUint64(l[72:], mib) // data
	le.PutUint64(l[104:], 4096)
	le.PutUint64(l[112:], mib-4096)
	le.PutUint32(l[16:], sum(l[20:sector]))
	h := b[4096:]
	copy(h[4:], areaMagic)
	le.PutUint32(h[20:], 1)
	le.PutUint64(h[24:], 4096)
	le.PutUint64(h[32:], mib-4096)
	// The text goes around the end of the ring.
	at := mib - 4096 - 512
	le.PutUint64(h[40:], uint64(at))
	le.PutUint64(h[48:], uint64(len(text)))
	le.PutUint32(h[56:], sum([]byte(text)))
	le.PutUint32(h, sum(h[4:areaHead]))
	n := copy(h[at:mib-4096], text)
	copy(h[areaHead:], text[n:])
	return b
}

func fill(pairs ...string) string {
	t := textOf
	for i := 0; i < len(pairs); i += 2 {
		t = strings.ReplaceAll(t, pairs[i], pairs[i+1])
	}
	return strings.NewReplacer("STATUS", `status = ["RESIZEABLE", "READ", "WRITE"]`, "GROUP", "", "PVS", "", "PVFLAGS", "", "LVS", "").Replace(t)
}

func seg(body string) string {
	return `segment_count = 1 segment1 { start_extent = 0 extent_count = 4 ` + body + ` } }`
}

const visible = `status = ["READ", "WRITE", "VISIBLE"] `

// What is not linear is used, all of it, and so is what it is made of.
func TestOtherVolumes(t *testing.T) {
	for _, c := range []struct {
		name, lvs string
		free      int64 // extents
		refused   []string
	}{
		{"alone", "", 50, nil},
		{"linear", `b { ` + visible + seg(`type = "striped" stripe_count = 1 stripes = ["pv0", 20]`), 46, nil},
		{"snapshot", `cow { status = ["READ", "WRITE"] ` + seg(`type = "striped" stripe_count = 1 stripes = ["pv0", 20]`) +
			` snapshot0 { status = ["READ", "WRITE", "VISIBLE"] ` + seg(`type = "snapshot" chunk_size = 8 origin = "root" cow_store = "cow"`),
			46, []string{"cow", "root", "snapshot0"}},
		{"thin pool", `pool { ` + visible + seg(`type = "thin-pool" metadata = "tmeta" pool = "tdata" transaction_id = 1 chunk_size = 128`) +
			` tmeta { status = ["READ", "WRITE"] ` + seg(`type = "striped" stripe_count = 1 stripes = ["pv0", 20]`) +
			` tdata { status = ["READ", "WRITE"] ` + seg(`type = "striped" stripe_count = 1 stripes = ["pv0", 24]`) +
			` thin { ` + visible + seg(`type = "thin" thin_pool = "pool" transaction_id = 0 device_id = 1 external_origin = "root"`),
			42, []string{"pool", "root", "tdata", "thin", "tmeta"}},
		{"raid", `r { ` + visible + seg(`type = "raid1" device_count = 1 raids = ["m", "i"]`) +
			` m { status = ["READ", "WRITE"] ` + seg(`type = "striped" stripe_count = 1 stripes = ["pv0", 20]`) +
			` i { status = ["READ", "WRITE"] ` + seg(`type = "striped" stripe_count = 1 stripes = ["pv0", 24]`),
			42, []string{"i", "m", "r"}},
		{"two stripes on one", `s { ` + visible + seg(`type = "striped" stripe_count = 2 stripe_size = 128 stripes = ["pv0", 20, "pv0", 30]`), 46, []string{"s"}},
		{"stacked", `s { ` + visible + seg(`type = "striped" stripe_count = 1 stripes = ["root", 0]`), 50, []string{"root", "s"}},
		{"errors", `s { ` + visible + seg(`type = "error"`), 50, []string{"s"}},
		{"unknown status", `b { status = ["READ", "VISIBLE", "WEIRD"] ` + seg(`type = "striped" stripe_count = 1 stripes = ["pv0", 20]`), 46, []string{"b"}},
		{"flags", `b { ` + visible + ` flags = ["ERROR_WHEN_FULL"] ` + seg(`type = "striped" stripe_count = 1 stripes = ["pv0", 20]`), 46, []string{"b"}},
	} {
		pv, err := read(image(fill("LVS", c.lvs)))
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		free := int64(0)
		for _, f := range pv.Free {
			free += f.Len / mib
		}
		var refused []string
		for _, l := range pv.LVs {
			if l.Refusal != nil {
				refused = append(refused, l.Name)
			}
		}
		if free != c.free || !slices.Equal(refused, c.refused) {
			t.Errorf("%s: %d extents free, %v refused; want %d, %v", c.name, free, refused, c.free, c.refused)
		}
	}
}

func TestRefusals(t *testing.T) {
	linear := func(at string) string {
		return `b { ` + visible + seg(`type = "striped" stripe_count = 1 stripes = ["pv0", `+at+`]`)
	}
	for _, c := range []struct {
		name string
		text string
		want freespace.Code
	}{
		{"exported", fill("STATUS", `status = ["RESIZEABLE", "READ", "WRITE", "EXPORTED"]`), freespace.Unsupported},
		{"clustered", fill("STATUS", `status = ["READ", "WRITE", "CLUSTERED"]`), freespace.Unsupported},
		{"shared", fill("GROUP", `lock_type = "sanlock"`), freespace.Unsupported},
		{"unknown section", fill("GROUP", `things { a = 1 }`), freespace.UnknownFeature},
		{"missing", fill("PVFLAGS", `"MISSING"`), freespace.Unsupported},
		{"two physical volumes", fill("PVS", `pv1 { id = "x" }`), freespace.Unsupported},
		{"another one", fill("gWR397", "gWR398"), freespace.Damaged},
		{"shared extents", fill("LVS", linear("12")), freespace.Damaged},
		{"outside", fill("LVS", linear("58")), freespace.Damaged},
		{"negative", fill("LVS", linear("-1")), freespace.Damaged},
		{"mirror on the disk", fill("LVS", `b { `+visible+seg(`type = "mirror" mirror_count = 1 mirrors = ["pv0", 20]`)), freespace.Unsupported},
		{"odd name", fill("root {", "ro/ot {"), freespace.Damaged},
		{"extents on metadata", fill("pe_start = 2048", "pe_start = 1024"), freespace.Damaged},
		{"more extents than room", fill("pe_count = 60", "pe_count = 90"), freespace.Damaged},
		{"extent size", fill("extent_size = 2048", "extent_size = 0"), freespace.Damaged},
		{"version", fill("version = 1", "version = 2"), freespace.UnknownFeature},
		{"format", fill(`format = "lvm2"`, `format = "lvm1"`), freespace.Unsupported},
		{"no end", strings.TrimSpace(fill()) + " x {", freespace.Damaged},
		{"deep", strings.Repeat("a {", 100), freespace.Damaged},
		{"twice", fill("LVS", "root { }"), freespace.Damaged},
		{"string without end", `a = "`, freespace.Damaged},
		{"no volume group", "a = 1", freespace.Damaged},
	} {
		_, err := read(image(c.text))
		guesttest.Refused(t, c.name, err, c.want)
	}
	base := image(fill())
	if _, err := read(base); err != nil {
		t.Fatal(err)
	}
	for at, want := range map[int]freespace.Code{
		sector + 40:       freespace.BadChecksum, // label
		4096 + 50:         freespace.BadChecksum, // header
		4096 + 600:        freespace.BadChecksum, // text
		mib - 30:          freespace.BadChecksum,
		sector:            freespace.Damaged,
		sector + 8:        freespace.Damaged,
		2 * sector:        "", // nothing is there
		4096 + 100*sector: "",
	} {
		b := bytes.Clone(base)
		b[at] ^= 1
		_, err := read(b)
		if want == "" && err != nil {
			t.Errorf("byte %d: %v", at, err)
		} else if want != "" {
			guesttest.Refused(t, "byte "+strconv.Itoa(at), err, want)
		}
	}
	_, err := read(base[:63*mib])
	guesttest.Refused(t, "truncated", err, freespace.Truncated)
}

// A logical volume of two pieces reads and places as one.
func TestPieces(t *testing.T) {
	text := fill("segment_count = 1 # a comment }\n", "segment_count = 2\nsegment2 { start_extent = 10 extent_count = 5 type = \"striped\" stripe_count = 1 stripes = [\"pv0\", 1] }\n",
		`stripes = [ "pv0", 3 ]`, `stripes = [ "pv0", 30 ]`)
	b := image(text)
	pv, err := read(b)
	if err != nil || len(pv.LVs) != 1 || len(pv.LVs[0].Pieces) != 2 {
		t.Fatalf("%+v %v", pv, err)
	}
	lv := &pv.LVs[0]
	copy(b[31*mib:], imgtest.PatternBytes(1, 0, 10*mib))
	copy(b[2*mib:], imgtest.PatternBytes(1, 10*mib, 5*mib))
	all, err := io.ReadAll(io.NewSectionReader(lv.ReaderAt(bytes.NewReader(b)), 0, 20*mib))
	if err != nil || !bytes.Equal(all, imgtest.PatternBytes(1, 0, 15*mib)) {
		t.Errorf("%d bytes, %v", len(all), err)
	}
	var got []blockmap.Range
	lv.Place(9*mib+5, 2*mib, func(at, n int64) { got = append(got, blockmap.Range{Off: at, Len: n}) })
	if want := []blockmap.Range{{Off: 40*mib + 5, Len: mib - 5}, {Off: 2 * mib, Len: mib + 5}}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
