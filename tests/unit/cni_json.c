// SPDX-License-Identifier: Apache-2.0
//
// Shows how cni/json.h parses texts. Reads texts from standard input, each after its length in four bytes of host
// order. Writes a line for each: `no`, or all values of the document in one notation, strings as hexadecimal UTF-8.
#include "json.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct json json;

static void show(json_ref value)
{
    static char room[1 << 20];
    if (value->type == JSON_STRING) {
        putchar('"');
        // A string with a NUL is not a C string. It is shown as its source text.
        if (!json_copy(&json, value, room, sizeof(room)))
            printf("%.*s", (int)(value->end - value->begin), json.text + value->begin);
        else
            for (const char *at = room; *at; at++)
                printf("%02x", (unsigned char)*at);
        putchar(' ');
    } else if (value->type == JSON_ARRAY || value->type == JSON_OBJECT) {
        putchar(value->type == JSON_ARRAY ? '[' : '{');
        for (json_ref one = json_first(&json, value); one; one = json_next(&json, one))
            show(one);
        putchar(']');
    } else {
        printf("%.*s ", (int)(value->end - value->begin), json.text + value->begin);
    }
}

int main(void)
{
    uint32_t length;
    while (fread(&length, sizeof(length), 1, stdin) == 1) {
        char *text = malloc(length ? length : 1); // exactly this size, so that a read beyond the end is detected
        if (!text || fread(text, 1, length, stdin) != length)
            return EXIT_FAILURE;
        if (json_parse(&json, text, length)) {
            show(&json.values[0]);
            putchar('\n');
        } else {
            puts("no");
        }
        free(text);
    }
    return EXIT_SUCCESS;
}
