package cli

import (
	"fmt"

	"github.com/dustin/go-humanize"
)

// Bytes is a number of bytes for people and for scripts: "64 KiB (65536
// bytes)".
func Bytes(n int64) string {
	if n < 0 {
		return "-" + Bytes(-n)
	}
	if n < 1024 {
		return fmt.Sprintf("%d bytes", n)
	}
	return fmt.Sprintf("%s (%d bytes)", humanize.IBytes(uint64(n)), n)
}

// Printable makes text from an image harmless for a terminal.
func Printable(s string) string {
	q := fmt.Sprintf("%q", s)
	if q[1:len(q)-1] == s {
		return s
	}
	return q
}
