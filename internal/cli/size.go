package cli

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// Size is a number of bytes on the command line: 4096, 64K, 10M, 20G, 1T
// (powers of 1024; "KiB" and "kib" are the same).
type Size int64

// UnmarshalText makes Size a flag.
func (s *Size) UnmarshalText(text []byte) error {
	n, err := ParseSize(string(text))
	if err == nil {
		*s = Size(n)
	}
	return err
}

// ParseSize reads a Size.
func ParseSize(text string) (int64, error) {
	bad := fmt.Errorf("size %q: want a number of bytes such as 4096, 64K, 10M, 20G or 1T", text)
	digits := strings.TrimRight(text, "bBiIkKmMgGtTpPeE")
	unit := strings.ToUpper(text[len(digits):])
	shift := 0
	if unit != "" && unit != "B" {
		shift = 10 * (1 + strings.IndexByte("KMGTPE", unit[0]))
		if shift == 0 || unit[1:] != "" && unit[1:] != "IB" && unit[1:] != "B" {
			return 0, bad
		}
	}
	n, err := strconv.ParseUint(digits, 10, 63)
	if err != nil || n > math.MaxInt64>>shift {
		return 0, bad
	}
	return int64(n) << shift, nil
}
