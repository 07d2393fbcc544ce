package guestfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
)

// ErrDamaged is wrapped by every error about a damaged structure.
var ErrDamaged = errors.New("damaged")

// Partition is one entry of a partition table.
type Partition struct {
	Number int    // as the kernel numbers them: logical ones from 5
	Start  int64  // bytes
	Size   int64  // bytes, at least 1
	Type   string // a GUID in upper case (GPT), or a number in hexadecimal (MBR)
	Name   string // GPT only
	UUID   string // PARTUUID: a GUID in upper case (GPT), or the disk's signature and the number (MBR)
	// Container marks an extended partition: what it holds are the logical
	// ones, which are listed as well.
	Container bool
}

// End is the first byte behind p.
func (p Partition) End() int64 { return p.Start + p.Size }

// DamageError says what is wrong where on the disk.
type DamageError struct {
	Offset int64 // byte offset on the disk
	Field  string
	Value  any
	Why    string
}

func (e *DamageError) Error() string {
	msg := fmt.Sprintf("partition table: offset %#x: %s", e.Offset, e.Field)
	if e.Value != nil {
		msg += fmt.Sprintf(" = %v", e.Value)
	}
	return msg + ": " + e.Why
}

// Unwrap makes errors.Is(err, ErrDamaged) hold.
func (e *DamageError) Unwrap() error { return ErrDamaged }

func damage(offset int64, field string, value any, why string) error {
	return &DamageError{offset, field, value, why}
}

// mbrSector is the unit of an MBR and the size of its sectors.
const mbrSector = 512

// Partitions reads the partition table of a disk of size bytes, by the rules
// of the Linux kernel: a GPT where a protective (or hybrid) MBR announces one,
// else an MBR with its chain of logical partitions. The result is in order of
// Number; it is empty when the disk has no table. Damage (a wrong checksum of
// both GPTs, a partition outside the disk, two that overlap, a chain that
// leads astray) is an error that wraps ErrDamaged.
func Partitions(ctx context.Context, r io.ReaderAt, size int64) ([]Partition, error) {
	if size < mbrSector {
		return nil, nil
	}
	head := make([]byte, mbrSector)
	if err := readFull(r, head, 0); err != nil {
		return nil, err
	}
	table, ok := parseMBR(head)
	if !ok {
		return nil, nil
	}
	var parts []Partition
	var err error
	if table.protective() {
		parts, err = readGPT(r, size)
	} else {
		parts, err = readMBR(ctx, r, size, table)
	}
	if err != nil {
		return nil, err
	}
	if err := checkOverlap(parts); err != nil {
		return nil, err
	}
	return parts, nil
}

// readFull fills p from off; the end of the disk is an error.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("partition table: offset %#x: %w", off, err)
}

// checkOverlap finds two partitions that share bytes. Containers hold others
// and are left out.
func checkOverlap(parts []Partition) error {
	sorted := slices.DeleteFunc(slices.Clone(parts), func(p Partition) bool { return p.Container })
	slices.SortFunc(sorted, func(a, b Partition) int {
		if a.Start != b.Start {
			if a.Start < b.Start {
				return -1
			}
			return 1
		}
		return a.Number - b.Number
	})
	for i := 1; i < len(sorted); i++ {
		if a, b := sorted[i-1], sorted[i]; b.Start < a.End() {
			return damage(b.Start, fmt.Sprintf("partition %d", b.Number), nil,
				fmt.Sprintf("it overlaps partition %d, which ends at %#x", a.Number, a.End()))
		}
	}
	return nil
}
