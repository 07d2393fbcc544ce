package layers

import (
	"errors"
	"fmt"
	"strings"

	"github.com/imagestack/imagestack/backend"
)

// Classes of errors. Every error that a format, open or a Stack returns about
// an image wraps exactly one of them, or an error of the operating system.
var (
	// ErrFormat: this is not an image of the stated format, or a field of it
	// has a value that the format does not allow and that nothing can mend.
	ErrFormat = errors.New("not a valid image")
	// ErrUnsupported: a valid feature that is not (or must not be) handled in
	// this mode. The error names the feature.
	ErrUnsupported = errors.New("unsupported feature")
	// ErrCorrupt: damage that image-fsck is for.
	ErrCorrupt = errors.New("image is damaged")
	// ErrInUse: another program holds the image.
	ErrInUse = backend.ErrInUse
	// ErrReadOnly: a change was asked of something opened for reading.
	ErrReadOnly = errors.New("image is opened read-only")
	// ErrPolicy: a path or a format that the policy on untrusted images does
	// not permit. The error names the flag that permits it.
	ErrPolicy = errors.New("not permitted")
)

// ImageError says where in which image something is wrong: file, offset,
// field, value. Err is (or wraps) a class of this package or the cause.
type ImageError struct {
	Path   string // the file, as it was named
	Layer  int    // position in the stack, 0 is the top; -1 when not known
	Offset int64  // byte offset in the file; -1 when no place fits
	Field  string // the format's own name of the field; "" when none fits
	Value  any    // the value found; nil when none fits
	Err    error
}

func (e *ImageError) Error() string {
	var b strings.Builder
	b.WriteString(e.Path)
	if e.Offset >= 0 {
		fmt.Fprintf(&b, ": offset %#x", e.Offset)
	}
	if e.Field != "" {
		fmt.Fprintf(&b, ": %s", e.Field)
	}
	if e.Value != nil {
		switch v := e.Value.(type) {
		case uint8, uint16, uint32, uint64, int8, int16, int32, int64, int, uint:
			fmt.Fprintf(&b, " = %#x", v)
		default:
			fmt.Fprintf(&b, " = %q", fmt.Sprint(v))
		}
	}
	fmt.Fprintf(&b, ": %v", e.Err)
	return b.String()
}

func (e *ImageError) Unwrap() error { return e.Err }
