package guestfs

import (
	"bytes"
	"context"
	"io"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest/mutate"
)

// FuzzFree looks at disks of any content.
func FuzzFree(f *testing.F) {
	disk := make([]byte, 256<<10)
	copy(disk[446:], []byte{0, 0, 0, 0, 0x83, 0, 0, 0, 8, 0, 0, 0, 0xf0, 1, 0, 0})
	disk[510], disk[511] = 0x55, 0xaa
	f.Add(disk[:48<<10])
	area := make([]byte, 64<<10)
	copy(area[4086:], "SWAPSPACE2")
	area[1024], area[1028] = 1, 15
	f.Add(area[:8<<10])
	f.Fuzz(func(t *testing.T, b []byte) {
		judged(t, bytes.NewReader(b), int64(len(b)))
	})
}

// FuzzDisk changes numbers of partition tables and of what is in the
// partitions; the checksums of both are then made right again.
func FuzzDisk(f *testing.F) {
	disks := []*mutate.Guest{
		mutate.GPTDisk(mutate.ByName("ext2"), mutate.ByName("swap"), mutate.ByName("ext4-dirty")),
		mutate.GPTDisk(mutate.ByName("swap")),
	}
	for i, d := range disks {
		if rep := judged(f, d.Image, d.Image.Size()); len(rep.Free) == 0 || len(rep.Areas) < 2 {
			f.Fatalf("%+v", rep.Areas)
		}
		for n := 0; n < d.Fields(); n += 3 {
			f.Add(byte(i), []byte{0, byte(n >> 8), byte(n), byte(n), byte(3 * n)})
		}
	}
	f.Fuzz(func(t *testing.T, which byte, script []byte) {
		s := disks[int(which)%len(disks)].Damage(script)
		judged(t, s, s.Size())
	})
}

// judged runs Free and checks what holds for every answer.
func judged(t testing.TB, r io.ReaderAt, size int64) *Report {
	rep, err := Free(context.Background(), r, size, Options{Gaps: true, Swap: true})
	if err != nil {
		t.Fatal(err)
	}
	last := int64(-1)
	for _, f := range rep.Free {
		if f.Off <= last || f.Len <= 0 || f.Off > size-f.Len {
			t.Fatalf("range %+v behind %d on %d bytes", f, last, size)
		}
		last = f.End()
	}
	for _, a := range rep.Areas {
		if a.Refusal != nil && (a.Free != 0 || a.Refusal.Code == "" || a.Refusal.Text == "") {
			t.Fatalf("refused, and yet: %+v", a)
		}
	}
	return rep
}
