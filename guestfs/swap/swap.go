// Package swap judges Linux swap areas: all pages but the header and the bad
// ones are free, when the guest does not wait there to be resumed.
package swap

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"slices"

	"github.com/imagestack/imagestack/guestfs/freespace"
)

// The header is the first page, whatever its size was for the guest: the
// signature ends it, and the fields are at 1,024 (mkswap(8), linux/swap.h).
var pageSizes = []int{4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10}

const maxBadPages = 637 // as many as the header of a page of 4 KiB holds

// signatureAt returns the page size at whose end one of the signatures is.
func signatureAt(head []byte, want ...string) (page int, name string) {
	for _, p := range pageSizes {
		if len(head) < p {
			break
		}
		for _, w := range want {
			if string(head[p-10:][:len(w)]) == w {
				return p, w
			}
		}
	}
	return 0, ""
}

// Detect reports whether head begins with a swap header, of any version.
func Detect(head []byte) bool {
	p, _ := signatureAt(head, "SWAPSPACE2", "SWAP-SPACE")
	return p != 0
}

// DetectSuspended reports whether head is that of a swap area from which a
// guest wants to be resumed.
func DetectSuspended(head []byte) bool {
	p, _ := signatureAt(head, "S1SUSPEND", "S2SUSPEND", "ULSUSPEND", "LINHIB0001", "\xed\xc3\x02\xe9\x98\x56\xe5\x0c")
	return p != 0
}

// Free is the freespace.Reader of swap areas.
func Free(ctx context.Context, r io.ReaderAt, size int64, emit freespace.Emit) (freespace.Info, error) {
	var info freespace.Info
	head := make([]byte, min(size, int64(pageSizes[len(pageSizes)-1])))
	if err := freespace.ReadAt(r, head, 0); err != nil {
		return info, err
	}
	page, name := signatureAt(head, "SWAPSPACE2", "SWAP-SPACE")
	if page == 0 || name != "SWAPSPACE2" || DetectSuspended(head) {
		return info, freespace.Refuse(freespace.Unsupported, "swap: no header of version 2, or one to resume from")
	}
	le := binary.LittleEndian
	version, last, bad := le.Uint32(head[1024:]), int64(le.Uint32(head[1028:])), le.Uint32(head[1032:])
	u := head[1036:1052]
	info.UUID = fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
	info.BlockSize = int64(page)
	if version != 1 {
		return info, freespace.Refuse(freespace.UnknownFeature, "swap: header version %#x", version)
	}
	if bad > maxBadPages {
		return info, freespace.Refuse(freespace.Damaged, "swap: %d bad pages", bad)
	}
	if last < 1 || last >= size/int64(page) {
		return info, freespace.Refuse(freespace.Truncated, "swap: its last page %d is not in %d bytes", last, size)
	}
	skip := make([]int64, 0, bad+1)
	for i := range bad {
		n := int64(le.Uint32(head[1536+4*i:]))
		if n < 1 || n > last {
			return info, freespace.Refuse(freespace.Damaged, "swap: bad page %d of %d", n, last)
		}
		skip = append(skip, n)
	}
	skip = append(skip, last+1)
	slices.Sort(skip)
	at := int64(1)
	for _, n := range skip {
		if n > at {
			if err := emit(at*int64(page), (n-at)*int64(page)); err != nil {
				return info, err
			}
		}
		at = n + 1
	}
	return info, ctx.Err()
}
